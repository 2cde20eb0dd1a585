"""From a heap of files to clean shards: what is kept, what is dropped and why.

`curate` reads folders, tars and Parquet; measures and cleans each picture; drops copies; and writes WebDataset shards,
an index and a page. The shard is the unit of restart.
"""
