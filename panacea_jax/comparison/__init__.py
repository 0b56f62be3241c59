"""Methods × seeds × poison ratios under equal conditions, and one table of what came out."""
