"""From shards to batches of crops, in an order that depends on the seed alone.

    index.json --ShardIndex--> eligible samples --EpochOrder--> positions --build_loader--> uint8 crops

`images` decodes one image and `regions` a part of it, `index` reads `index.json`, `order` says which sample and which
crop stands at a position, `crops` makes pixels of them, `loader` makes batches in worker processes. Only `crops` and
`loader` import torch.

`reader` fetches a sample's bytes; `source` chooses how: from a folder, or from a URL, by ranges or through `cache`,
whole shards in a folder of bounded size (`room`) that `prefetch` fills ahead of the loader.
"""
