"""Images and labels: where they come from, which are held out, in what order they are trained on."""
