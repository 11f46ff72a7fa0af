// Bytes to pictures. H.264 needs WebCodecs, which browsers have in secure contexts only: https and loopback.

const H264 = "avc1.42E01F";

/** The codecs that this browser decodes, best first. */
export async function decodableCodecs() {
  const images = ["jpeg", "webp"];
  if (!globalThis.isSecureContext || !globalThis.VideoDecoder) return images;
  const { supported } = await VideoDecoder.isConfigSupported({ codec: H264 });
  return supported ? ["h264", ...images] : images;
}

/**
 * Decodes the pictures of one lane. `receive(frame, bitmap)` is called for each, in any order within a block.
 */
export function newDecoder({ codec, codec_string: codecString }, receive, fail) {
  return codec === "h264" ? new VideoPictures(codecString ?? H264, receive, fail)
    : new ImagePictures(codec, receive, fail);
}

class ImagePictures {
  #codec;
  #receive;
  #fail;

  constructor(codec, receive, fail) {
    this.#codec = codec;
    this.#receive = receive;
    this.#fail = fail;
  }

  decode(firstFrame, pictures) {
    pictures.forEach((bytes, i) => {
      const image = new Blob([bytes], { type: `image/${this.#codec}` });
      createImageBitmap(image).then((bitmap) => this.#receive(firstFrame + i, bitmap), this.#fail);
    });
  }

  close() {}
}

class VideoPictures {
  #decoder;

  constructor(codec, receive, fail) {
    this.#decoder = new VideoDecoder({
      output: (picture) => {
        // A decoder has few pictures to lend and stops when they are out: each is copied and given back at once.
        const frame = picture.timestamp;
        createImageBitmap(picture).then((bitmap) => receive(frame, bitmap), fail).finally(() => picture.close());
      },
      error: fail,
    });
    this.#decoder.configure({ codec, optimizeForLatency: true });
  }

  decode(firstFrame, pictures) {
    pictures.forEach((data, i) => {
      const type = i === 0 ? "key" : "delta";
      this.#decoder.decode(new EncodedVideoChunk({ type, data, timestamp: firstFrame + i }));
    });
    // The last pictures of a block are not kept back for the next, which begins with a key frame.
    this.#decoder.flush().catch(() => {});
  }

  close() {
    if (this.#decoder.state !== "closed") this.#decoder.close();
  }
}
