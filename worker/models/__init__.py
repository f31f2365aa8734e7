"""The models' files: what there is, downloading, converting, checking."""
