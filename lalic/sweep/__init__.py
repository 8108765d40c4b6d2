"""The quality ladder as one object: `lalic sweep` (cli.py).

plan.py      which rungs there are, their run folders and settings
launcher.py  one rung's training as a subprocess: started, followed, asked to stop
climb.py     the rungs one after the other
slurm.py     the rungs as an array job instead
table.py     one table of their state
"""
