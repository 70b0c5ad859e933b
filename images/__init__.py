"""Turn image files into arrays of pixels. Data passes these modules in this order; each imports only earlier ones.

Find: `walk` finds image files, `folders` finds the parts and classes of a data set.
List: `lookup` finds a named file, `inputs` those of a prediction, `tables` reads, `naming` checks, `labels` lists all.
Divide: `split` decides which images train, validate and test.
Decode: `decode` reads a file, `cache_files` keep the output of `cache`, `stores` gives batches, cached or streamed.
Subset: `subsets` holds a part, `soundness` refuses unfit ones, `opening` does all of it, `asked` as options say.
Put on disk: `check` reports, `placing` moves data into place, `archive` unpacks one, `scenes` and `demo` draw one.
"""
