"""Image files to uint8 arrays: listing, decoding, caching, and the drawn demo scenes."""
