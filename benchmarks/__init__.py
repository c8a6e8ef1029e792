"""Speed and quality, measured: one command per claim, each ending with one line `RESULT {json}` of names and numbers.

Nothing here is imported by what is measured, and no test asserts a speed or a quality.
"""
