"""Referees of `aitools export`: who else reads these formats accepts them, and refuses them with one byte changed.

Usage: evidence.py FOLDER MODEL PUBLIC_KEY, where FOLDER has `sbom.cdx.json`, `tiny-cpu.intoto.json` and `m.model.sig`.
"""

import base64
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

from cryptography.hazmat.primitives.serialization import load_pem_public_key
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1 import statement_pb2
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey

folder, model, public = map(pathlib.Path, sys.argv[1:4])

# CycloneDX 1.6, strictly: no unknown key.
bom = (folder / "sbom.cdx.json").read_text()
validator = JsonStrictValidator(SchemaVersion.V1_6)
assert validator.validate_str(bom) is None, validator.validate_str(bom)
assert validator.validate_str(bom.replace('"modelCard"', '"modelCarf"', 1)) is not None
assert validator.validate_str(bom.replace('"SHA-256"', '"SHA-257"', 1)) is not None
components = json.loads(bom)["components"]
assert {"application", "machine-learning-model", "data"} <= {part["type"] for part in components}, components

# The DSSE envelope, by securesystemslib.
envelope = json.loads((folder / "tiny-cpu.intoto.json").read_text())
key = SSlibKey.from_crypto(load_pem_public_key(public.read_bytes()), keyid=envelope["signatures"][0]["keyid"])
key.scheme = "ecdsa-sha2-nistp256"
Envelope.from_dict(json.loads(json.dumps(envelope))).verify([key], 1)
payload = bytearray(base64.b64decode(envelope["payload"]))
payload[len(payload) // 2] ^= 1
forged = dict(envelope, payload=base64.b64encode(bytes(payload)).decode())
try:
    Envelope.from_dict(forged).verify([key], 1)
    raise SystemExit("a forged envelope was accepted")
except VerificationError:
    pass

# The statement and its provenance, by in-toto's own types.
statement = json.loads(base64.b64decode(envelope["payload"]))
parsed = json_format.ParseDict(statement, statement_pb2.Statement())
Statement.copy_from_pb(parsed).validate()
predicate = dict(statement["predicate"])
predicate["runDetails"] = {"builder": predicate["runDetails"]["builder"]}
provenance = json_format.ParseDict(predicate, provenance_pb2.Provenance())
assert provenance.build_definition.build_type == "urn:aitools:build:v1"
assert len(provenance.build_definition.resolved_dependencies) >= 1
parsed.subject[0].digest.clear()
try:
    Statement.copy_from_pb(parsed).validate()
    raise SystemExit("a subject without digest was accepted")
except ValueError:
    pass

# The model's signature, by OpenSSF's own program: over a copy of the folder, also with a byte of the model changed.
with tempfile.TemporaryDirectory() as scratch:
    copy = pathlib.Path(scratch) / model.name
    shutil.copytree(model, copy)
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(copy), "--signature", str(folder / "m.model.sig"),
               "--public_key", str(public)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    weights = next(copy.glob("*.gguf"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(data)
    assert subprocess.run(command, capture_output=True).returncode != 0, "a changed model was accepted"
print("evidence: accepted, and refused with one byte changed")
