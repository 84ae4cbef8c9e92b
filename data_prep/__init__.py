"""Raw text to globally shuffled, tokenised webdataset shards. Imports neither torch nor sutrain."""
