"""Several processes behind one port: the parent accepts connections and hands each to a worker, which serves it to its end."""
