"""One model over many processes: launch, mesh, and what is sharded how."""
