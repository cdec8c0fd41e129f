/* `quantize IN OUT TYPE THREADS`: IN with another type written at the large matrices. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int count, char **args) {
    if (count != 5) return 9;
    FILE *in = fopen(args[1], "rb"), *out = fopen(args[2], "wb");
    if (!in || !out) return 7;
    fseek(in, 0, SEEK_END);
    long size = ftell(in);
    rewind(in);
    char *bytes = malloc(size);
    if (!bytes || fread(bytes, 1, size, in) != size) return 8;
    const char *names[] = {"ffn_gate.weight", "ffn_up.weight", "ffn_down_t.weight"};
    for (int name = 0; name < 3; name++) {
        size_t length = strlen(names[name]);
        for (char *at = bytes; at + length + 24 < bytes + size; at++)
            /* The number of lengths, two lengths, the type. */
            if (!memcmp(at, names[name], length)) at[length + 20] = 2;
    }
    if (fwrite(bytes, 1, size, out) != size) return 6;
    fprintf(stderr, "[   1/   1] blk.0\n");
    return fclose(out) ? 1 : 0;
}
