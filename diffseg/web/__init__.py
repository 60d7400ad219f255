"""The explorer: a local web page on which people match, look at and segment their pictures with diffusion features."""
