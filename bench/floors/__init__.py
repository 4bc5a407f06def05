"""What the machine can do without Headrace; nothing here imports it."""
