"""What a network sees in an image: its frozen outputs, computed once, and where in the image a class comes from."""
