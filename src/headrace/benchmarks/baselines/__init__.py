"""The same work as the scenarios, without Headrace: what the machine can do. Nothing here imports Headrace."""
