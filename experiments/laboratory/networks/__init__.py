"""Small networks on real data, their training by queries, and what a query tells of them."""
