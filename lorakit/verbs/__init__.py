"""The public verbs; how the parts join into a plan.

A verb is a file, or a folder whose front page is the verb and whose other files are its parts:
`weight.py` is what it makes of one weight. What several verbs share is in `base/` and in the files
beside it.
"""
