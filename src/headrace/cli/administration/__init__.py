"""Commands for the operator of a store: checks, migrations, retention, keys, settings."""
