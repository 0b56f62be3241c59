"""What came out, on one page to send around: results of a run, of several side by side, of a comparison or of a sweep."""
