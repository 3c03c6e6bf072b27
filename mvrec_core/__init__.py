"""Events, tensors and scores. This library never imports ray: `pipelines` and `serve` decide where it runs."""
