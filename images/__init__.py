"""Turn image files into arrays of pixels. Data passes the modules in this order; each imports earlier ones alone.

Find: `walk` finds image files, `folders` finds the parts and classes of a data set.
List: `lookup` finds a file by what a table calls it, `tables` reads a table, `naming` judges names, `labels` lists all.
Divide: `split` decides which images train, validate and test.
Decode: `decode` reads a file, `cache_files` have what `cache` decoded, `stores` gives batches, cached or streamed.
Subset: `subsets` holds a part's images, `soundness` refuses unfit ones, `opening` does all of it, `check` reports it.
Put on disk: `placing` moves a whole data set into place, `archive` unpacks one, `scenes` and `demo` draw one.
"""
