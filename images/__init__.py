"""Turn image files into arrays of pixels. Each module imports only earlier ones of this list.

Find: `walk` finds image files, `folders` finds the parts and classes of a data set.
List: `lookup` finds a named file, `inputs` those of a prediction, `tables` reads, `naming` checks, `labels` lists all.
Divide: `split` decides which images train, validate and test.
Decode: `decode` reads a file, `cache_files` keep the output of `cache`, `stores` gives batches, cached or streamed.
Subset: `subsets` holds a part, `soundness` refuses unfit ones, `opening` does all of it.
Put on disk: `check` reports, `placing` moves into place, `archive` unpacks, `scenes` and `demo` draw; `asked` does all.
"""
