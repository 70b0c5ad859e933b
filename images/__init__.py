"""Turn image files into arrays of pixels. Data passes the modules in this order; each imports earlier ones alone.

Find: `walk` finds image files, `folders` finds the parts and classes of a data set.
List: `lookup` finds a file by what a table calls it, `tables` reads a table, `naming` judges names, `labels` lists all.
Divide: `split` decides which images train, validate and test.
Decode: `decode` reads one file, `cache` keeps what was decoded, `stores` gives batches from a cache or a stream.
Subset: `subsets` holds a part's images, `soundness` refuses unfit ones, `opening` does all of it, `check` reports it.
Put on disk: `placing` moves a whole data set into place, `archive` unpacks one, `scenes` and `demo` draw one.
"""
