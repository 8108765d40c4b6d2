"""From photographs, wherever they lie, to WebDataset shards with an index.

    opening     what --input names     -> a source (sources: what all of them have in common)
    files       folder or list         -> candidates with names and keys; lists reads the lists
    remote_files, tars                 -> the same of what lies elsewhere, and of tars, wherever they lie
    validation  one candidate          -> its bytes and size, or the reason why it is left out (in worker processes)
    workers     many candidates        -> the same in order, on many processes, whatever happens to them
    writer      usable images          -> one tar, its sum and its byte ranges
    state       finished shards    -> what need not be done again
    report      what was left out  -> progress, left_out.csv, the closing lines
    job         all of it, shard by shard; `shard` is the command

    output      a folder, or any URL   -> files that are whole or absent, one process at a time (lease)
    manifest    finished shards        -> the frozen manifest; frozen reads and checks one
    rebuild     manifest and images    -> the same shards (parts: those under way)
    checking    shards and their index -> what is wrong (shard_check: one shard); `verify` is the command

Installed as `lalic.data_prep`.
"""
