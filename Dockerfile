# kvw with the ONNX Runtime that it loads, for the CPU. The model folder and the data are mounted:
#
#     docker build -t kvw .
#     docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/data" kvw inspect model
#
FROM rust:1-slim-trixie AS build
RUN apt-get update && apt-get install --yes --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /maturin && /maturin/bin/pip install --no-cache-dir 'maturin>=1.9,<2'
WORKDIR /source
COPY . .
# Not a manylinux wheel: it is installed into the same release of the same distribution.
RUN /maturin/bin/maturin build --release --locked --compatibility linux --out /wheels

FROM python:3-slim-trixie
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels pip install --no-cache-dir /wheels/*.whl
RUN useradd --create-home kvw
USER kvw
WORKDIR /data
ENTRYPOINT ["kvw"]
CMD ["--help"]
