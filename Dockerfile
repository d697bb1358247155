# The OpenAI server. `docker compose up` mounts the engine directory at /engine.
# Not the slim image: compiling the decoding loop needs a C compiler.
FROM python:3.12 AS wheel
RUN pip install --no-cache-dir "setuptools>=77,<90" "mypy>=1.15,<3" "numpy>=1.26,<3"
WORKDIR /source
COPY . .
RUN TRIMODE_COMPILE=1 pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python:3.12-slim
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/trimode-*.whl)[serve]"
RUN useradd --no-create-home --uid 10001 trimode
USER 10001
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=3)"]
# 0.0.0.0 is inside the container; compose.yaml publishes the port on the host's loopback interface only.
ENTRYPOINT ["trimode", "serve", "/engine", "--host", "0.0.0.0"]
