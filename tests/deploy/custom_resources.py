"""Closed schemas of the fields of custom resources that deploy/kubernetes uses.

After the definitions of the Prometheus operator 0.85 (PodMonitor), of KEDA 2.17 (ScaledObject) and
of cert-manager 1.18 (Issuer, Certificate), which have many more fields: one that is not here is
looked up there first.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
DURATION: Schema = {"type": "string", "pattern": r"^([0-9]+(ms|s|m|h))+$"}
LABELS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def closed(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """Return the schema of an object with these fields and no other."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


def many(item: Schema) -> Schema:
    """Return the schema of a list that is not empty."""
    return {"type": "array", "items": item, "minItems": 1}


def resource(api_version: str, kind: str, spec: Schema) -> Schema:
    """Return the schema of a whole object."""
    metadata = closed({"name": TEXT}, {"namespace": TEXT, "labels": LABELS})
    return closed(
        {
            "apiVersion": {"const": api_version},
            "kind": {"const": kind},
            "metadata": metadata,
            "spec": spec,
        }
    )


POD_MONITOR = resource(
    "monitoring.coreos.com/v1",
    "PodMonitor",
    closed(
        {
            "selector": closed({"matchLabels": LABELS}),
            "podMetricsEndpoints": many(
                closed(
                    {"port": TEXT},
                    {
                        "path": TEXT,
                        "interval": DURATION,
                        "scrapeTimeout": DURATION,
                        "relabelings": many(
                            closed(
                                {"sourceLabels": many(TEXT), "targetLabel": TEXT},
                                {"regex": TEXT, "replacement": TEXT},
                            )
                        ),
                    },
                )
            ),
        },
        {"podTargetLabels": many(TEXT), "jobLabel": TEXT},
    ),
)

SCALED_OBJECT = resource(
    "keda.sh/v1alpha1",
    "ScaledObject",
    closed(
        {
            "scaleTargetRef": closed({"name": TEXT}, {"apiVersion": TEXT, "kind": TEXT}),
            "triggers": many(
                closed(
                    {
                        "type": {"const": "prometheus"},
                        "metadata": closed(
                            {"serverAddress": TEXT, "query": TEXT, "threshold": TEXT},
                            {"activationThreshold": TEXT},
                        ),
                    },
                    {"metricType": {"enum": ["AverageValue", "Value"]}},
                )
            ),
        },
        {
            "minReplicaCount": COUNT,
            "maxReplicaCount": COUNT,
            "pollingInterval": COUNT,
            "cooldownPeriod": COUNT,
            "fallback": closed({"failureThreshold": COUNT, "replicas": COUNT}),
            "advanced": closed(
                {
                    "horizontalPodAutoscalerConfig": closed(
                        {
                            "behavior": closed(
                                {"scaleDown": closed({"stabilizationWindowSeconds": COUNT})}
                            )
                        }
                    )
                }
            ),
        },
    ),
)

ISSUER = resource(
    "cert-manager.io/v1",
    "Issuer",
    {"oneOf": [closed({"selfSigned": closed({})}), closed({"ca": closed({"secretName": TEXT})})]},
)

CERTIFICATE = resource(
    "cert-manager.io/v1",
    "Certificate",
    closed(
        {
            "secretName": TEXT,
            "issuerRef": closed({"name": TEXT, "kind": {"const": "Issuer"}}),
            "privateKey": closed(
                {
                    "algorithm": {"const": "ECDSA"},
                    "size": {"enum": [256, 384, 521]},
                    "rotationPolicy": {"enum": ["Always", "Never"]},
                }
            ),
        },
        {
            "commonName": {"type": "string", "maxLength": 64},
            "dnsNames": many(TEXT),
            "usages": many({"enum": ["digital signature", "server auth", "client auth"]}),
            "isCA": {"type": "boolean"},
            "duration": DURATION,
            "renewBefore": DURATION,
        },
    ),
)

SCHEMAS = {
    "PodMonitor": POD_MONITOR,
    "ScaledObject": SCALED_OBJECT,
    "Issuer": ISSUER,
    "Certificate": CERTIFICATE,
}
