"""Turn image files into uint8 arrays. The modules in the order in which data takes them; each imports earlier ones alone.

Put on disk: `scenes` draws, `archive` unpacks, `placing` moves a whole data set into place, `demo` draws the demo.
Find: `walk` finds image files, `folders` finds the parts and classes of a data set.
List: `lookup` finds a file by what a table calls it, `tables` reads a table, `naming` judges names, `labels` lists all.
Divide: `split` decides which images train, validate and test.
Decode: `decode` reads one file, `cache` keeps what was decoded, `stores` gives batches from a cache or a stream.
Subset: `subsets` holds the images of a part, `soundness` refuses what cannot be trained on, `opening` does all of it.
Check: `check` reports on a data set without a training.
"""
