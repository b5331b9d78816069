"""The contract between training, service and edge: the model card, and what runs an exported model. No torch."""
