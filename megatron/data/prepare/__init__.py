"""From text files to tokenized datasets."""
