"""What commands do once their options are read: torch, Lightning and the libraries of models are loaded here."""
