"""Real processes, killed and started again: few, named as stories."""
