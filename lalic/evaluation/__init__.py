"""The parts of `lalic eval`: processes that share a folder, what they have measured so far, the result file."""
