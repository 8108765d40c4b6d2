"""Bundles of small models that come with the package: what `lalic compress` takes by itself (lalic.release_builtin).

Each is a folder as `lalic export --precision float16 --output weights/` writes it; SHA256SUMS is over all of them.
"""
