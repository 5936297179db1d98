"""The order in which samples are read, index for index that of Megatron and NeoX."""
