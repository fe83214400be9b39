"""The models, a file for each family of packages."""
