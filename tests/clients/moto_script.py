"""Runs with moto's own Python: an S3 store over HTTP, until standard input ends.

It puts the files of a folder into the bucket "models", once whole with their sha256 (below
`whole/`), once in parts of five megabytes (below `parts/`), and prints its URL.
"""

import json
import sys
from pathlib import Path

import boto3
from boto3.s3.transfer import TransferConfig
from moto.server import ThreadedMotoServer


def main() -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    store = boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    )
    store.create_bucket(Bucket="models")
    parts = TransferConfig(multipart_threshold=5 * 2**20, multipart_chunksize=5 * 2**20)
    for path in Path(sys.argv[1]).iterdir():
        name, body = path.name, path.read_bytes()
        store.put_object(
            Bucket="models", Key=f"whole/{name}", Body=body, ChecksumAlgorithm="SHA256"
        )
        store.upload_file(str(path), "models", f"parts/{name}", Config=parts)
    print(json.dumps(url), flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main()
