"""The Serve config that `raymoe serve` deploys without --config. It equals services/raymoe.yaml."""

from __future__ import annotations

from typing import Any


def default_config() -> dict[str, Any]:
    """Return a new Serve config with one application, which serves the newest export on 127.0.0.1:8000."""
    application = {
        "name": "raymoe",
        "route_prefix": "/",
        "import_path": "raymoe.serving.app:build",
        "args": {
            "artifact": "newest",
            "resident_bytes": "all",
            "trunks": 1,
            "min_replicas": 0,
            "max_replicas": 4,
        },
        "autoscaling_policy": {
            "policy_function": "raymoe.serving.serve_policy:Scaler",
            "policy_kwargs": {"target": 0.6},
        },
    }
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [application],
    }
