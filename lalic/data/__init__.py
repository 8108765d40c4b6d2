"""From shards on disk to batches of crops, in an order that depends on the seed alone.

    index.json --ShardIndex--> eligible samples --EpochOrder--> positions --build_loader--> uint8 crops

`images` decodes one image, `index` reads `index.json`, `order` says which sample and which crop stands at a
position, `reader` fetches its bytes, `crops` makes pixels of them, `loader` makes batches in worker processes. Only
the last two import torch.
"""
