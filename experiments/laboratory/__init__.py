"""The claims of both papers, and some of our own, checked on two cores in minutes each."""
