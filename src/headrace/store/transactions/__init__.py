"""The operations of a store as scripts, written once for both databases.

A script is a generator that yields named statements with their values, and is sent the rows. It knows the names of
statements and no driver: SQLite's writer thread runs it step by step, and PostgreSQL awaits each step. A database may
do in one statement what the script does in several; the conformance tests hold both to the same results.
"""
