"""Every setting, with its default and unit.

training.py   what a stage trains, and for how long: base, adapters, router, joint; a recipe of all four; a live domain
serving.py    what an application serves: its entrance and replicas, one replica's engine, fetching adapters
places.py     where things lie by default, and how a path that a user wrote is read
settings.py   what all settings have in common
"""
