"""cluster.yaml and the account's template against an AWS that is made up by moto: Ray's own provider uses them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_NODE_KIND

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
REGION = "us-west-2"


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An account in which the template was deployed."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        boto3.client("cloudformation", REGION).create_stack(
            StackName="minimind-ray",
            TemplateBody=(ROOT / "cluster/aws-account.cfn").read_text(),
            Capabilities=["CAPABILITY_NAMED_IAM"],
            Parameters=[
                {"ParameterKey": "Bucket", "ParameterValue": "bucket"},
                {"ParameterKey": "Address", "ParameterValue": "198.51.100.7/32"},
            ],
        )
        yield


@pytest.mark.usefixtures("account")
def test_ray_starts_machines_with_the_accounts_group_and_roles() -> None:
    config: dict[str, Any] = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    validate_config(config)
    config = AWSNodeProvider.bootstrap_config(config)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    types = config["available_node_types"]
    provider.create_node({**types["head"]["node_config"], **config["head_node"]}, {TAG_RAY_NODE_KIND: "head"}, 1)
    provider.create_node(types["gpu-1-spot"]["node_config"], {TAG_RAY_NODE_KIND: "worker"}, 1)
    found = {
        node["InstanceType"]: node
        for reservation in boto3.client("ec2", REGION).describe_instances()["Reservations"]
        for node in reservation["Instances"]
    }
    head, worker = found["m7i.xlarge"], found["g6.2xlarge"]
    assert head["IamInstanceProfile"]["Arn"].endswith("/minimind-ray-head")
    assert worker["IamInstanceProfile"]["Arn"].endswith("/minimind-ray-worker")
    assert worker["InstanceLifecycle"] == "spot"
    assert "InstanceLifecycle" not in head
    for node in (head, worker):
        assert [group["GroupName"] for group in node["SecurityGroups"]] == ["minimind-ray"]
        assert {"Key": "ray-cluster-name", "Value": "minimind"} in node["Tags"]


@pytest.mark.usefixtures("account")
def test_only_ssh_from_one_address_and_the_nodes_themselves_are_let_in() -> None:
    (group,) = boto3.client("ec2", REGION).describe_security_groups(
        Filters=[{"Name": "group-name", "Values": ["minimind-ray"]}]
    )["SecurityGroups"]
    rules = {rule["IpProtocol"]: rule for rule in group["IpPermissions"]}
    assert set(rules) == {"tcp", "-1"}
    assert (rules["tcp"]["FromPort"], rules["tcp"]["ToPort"]) == (22, 22)
    assert [r["CidrIp"] for r in rules["tcp"]["IpRanges"]] == ["198.51.100.7/32"]
    assert not rules["-1"]["IpRanges"]
    assert [pair["GroupId"] for pair in rules["-1"]["UserIdGroupPairs"]] == [group["GroupId"]]


@pytest.mark.usefixtures("account")
def test_roles_reach_one_bucket_and_workers_nothing_else() -> None:
    iam = boto3.client("iam", REGION)
    assert iam.list_role_policies(RoleName="minimind-ray-worker")["PolicyNames"] == []
    (attached,) = iam.list_attached_role_policies(RoleName="minimind-ray-worker")["AttachedPolicies"]
    version = iam.get_policy(PolicyArn=attached["PolicyArn"])["Policy"]["DefaultVersionId"]
    document = iam.get_policy_version(PolicyArn=attached["PolicyArn"], VersionId=version)["PolicyVersion"]["Document"]
    assert {s["Resource"] for s in document["Statement"]} == {"arn:aws:s3:::bucket", "arn:aws:s3:::bucket/*"}
    (name,) = iam.list_role_policies(RoleName="minimind-ray-head")["PolicyNames"]
    document = iam.get_role_policy(RoleName="minimind-ray-head", PolicyName=name)["PolicyDocument"]
    # moto gives an inline policy as text, AWS as a tree.
    statements = (yaml.safe_load(document) if isinstance(document, str) else document)["Statement"]
    (ending,) = [s for s in statements if "ec2:TerminateInstances" in s["Action"]]
    assert ending["Condition"] == {"StringEquals": {"ec2:ResourceTag/ray-cluster-name": "minimind"}}
    assert "*" not in str([statement["Action"] for statement in statements])
