"""The making of ZeroSearch's simulated search engine: collect searches, label their documents, train a model to write such, look at what it writes."""
