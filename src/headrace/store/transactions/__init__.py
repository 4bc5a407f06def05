"""What each verb of the seam does, once for every database.

A verb is a *script*: a generator that yields named statements with their values and is sent the rows. It knows the
statements' names and no driver, so SQLite's writer thread runs it step by step and Postgres awaits each step. What a
dialect can do in one statement it may do without the script; the conformance suite holds both to the same.
"""
