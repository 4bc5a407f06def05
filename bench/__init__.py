"""Research scripts for measurements that `headrace bench` does not ship."""
