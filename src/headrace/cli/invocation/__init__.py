"""Settings, engine, event loop, signals and terminal of one command; every command uses it."""
