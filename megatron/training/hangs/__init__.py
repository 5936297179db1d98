"""Notices that ranks wait for each other in vain, and says which of them is to blame."""
