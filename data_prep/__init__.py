"""From folders of photographs to WebDataset shards with an index.

    sources     folder or list     -> ordered paths and keys
    validation  one path           -> its bytes and size, or the reason why it is left out (in worker
    processes) workers     many paths         -> the same in order, on many processes, whatever happens to
    them writer      usable images      -> one tar, its sum and its byte ranges
    state       finished shards    -> what need not be done again
    report      what was left out  -> progress, left_out.csv, the closing lines
    job         all of it, shard by shard; `shard` is the command

    output      a folder, or any URL   -> files that are whole or absent, one process at a time (lease)
    manifest    finished shards        -> the frozen manifest; frozen reads and checks one
    rebuild     manifest and images    -> the same shards (parts: those under way)
    checking    shards and their index -> what is wrong (shard_check: one shard); `verify` is the command

Installed as `lalic.data_prep`.
"""
