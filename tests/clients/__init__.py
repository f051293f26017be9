"""Published clients in environments of their own, and the servers they are run against."""
