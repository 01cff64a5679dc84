"""Drawing: from a request to pictures with their records, and back from a record to the same picture."""
