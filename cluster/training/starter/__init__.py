"""The starter's data: small, clearly different domains whose answers can be checked exactly, generated from a seed.

`facts` holds the tables of the fact domains, `domains` the grammar of every domain, `general` what belongs to no
domain, `generate` writes it all as Parquet.
"""
